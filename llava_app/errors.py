"""What a person may be told. Every other exception is a fault of the program and is never shown word for word."""


class UserError(Exception):
    """Something a person may be told: its text names what was wrong, the value, the limit and the next step."""


class ImageError(UserError):
    """A picture that cannot be used."""


class VideoError(UserError):
    """A clip that cannot be used."""


class ModelError(UserError):
    """A model, checkpoint or template that cannot be found, loaded or trusted."""


class ContextError(UserError):
    """A conversation that is longer than the model's context."""


class DataError(UserError):
    """A record of training or evaluation data that is not what it should be."""


class RecipeError(UserError):
    """A recipe with a setting that is missing, unknown or out of bounds."""


class TrainingError(UserError):
    """A training run that cannot start, go on or be resumed."""


class BusyError(UserError):
    """Too many requests at the same time."""
