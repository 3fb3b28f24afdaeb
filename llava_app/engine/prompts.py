"""Prompts as the decoder reads them: the embeddings of their tokens, with what the eyes saw in the pictures' places."""

import torch
from torch import Tensor

from llava_app.engine.features import FeatureCache
from llava_app.engine.request import Request, Shown
from llava_app.engine.watch import Meter
from llava_app.loading import Loaded
from llava_app.prompts import Prepared, prepare_shown


class Prompts:
    """The tower, the projector and the embeddings of a model."""

    def __init__(self, loaded: Loaded, features: FeatureCache, meter: Meter) -> None:
        """`features` of pictures are kept there; `meter` counts the pictures."""
        self._model = loaded.model
        self._processor = loaded.processor
        self._device = loaded.device
        self._image_token: int = loaded.model.config.image_token_id
        self._features = features
        self._meter = meter
        self.embeddings = loaded.model.get_input_embeddings()

    def embed(self, request: Request, begin: int) -> Tensor:
        """The embeddings of the prompt from token `begin` on, pictures in their places."""
        ids_S = torch.tensor(request.ids[begin:], device=self._device)
        embeds_SD = self.embeddings(ids_S.masked_fill(ids_S == self._image_token, 0))
        for shown in request.shown:
            if shown.end <= begin:
                self._meter.recalled += 1
                continue
            first = max(shown.start, begin)
            features_SD = self._see(shown, request.prepared)
            embeds_SD[first - begin : shown.end - begin] = features_SD[first - shown.start :].to(embeds_SD.dtype)
        return embeds_SD

    def _see(self, shown: Shown, prepared: dict[str, Prepared]) -> Tensor:
        """The projected features of a picture, (S, D)."""
        features_SD = self._features.get(shown.key)
        if features_SD is not None:
            self._meter.recalled += 1
            return features_SD
        seen = prepared.get(shown.key) or prepare_shown(shown.picture, self._processor, together=shown.together)
        pixels_T3HW = seen.pixel_values.to(self._device)
        if seen.is_clip:
            features_SD = self._model.get_video_features(pixels_T3HW[None]).pooler_output[0]
        else:
            shapes = {name: value.to(self._device) for name, value in seen.shapes.items()}
            features_SD = self._model.get_image_features(pixels_T3HW, **shapes).pooler_output[0]
        self._features.put(shown.key, features_SD)
        self._meter.seen += 1
        return features_SD
