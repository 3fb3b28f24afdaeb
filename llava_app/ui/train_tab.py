"""The Train tab: its components, and which event calls which handler.

It belongs on a machine of one's own: it starts processes and reads files of this machine.
"""

from pathlib import Path

import gradio as gr

from llava_app.ui.chat_tab import EVENT
from llava_app.ui.curves import REFRESH
from llava_app.ui.display import choices
from llava_app.ui.models import Models
from llava_app.ui.training import FIELDS, FIRST_PICTURES, UNTRAINED, Training

RECIPE = "memeworld_instruct"
ABOUT = (
    "## Train a LLaVA\n"
    f"One button draws {FIRST_PICTURES:,} small pictures with captions and questions, and trains the built-in model on "
    "them in its two stages. It takes minutes, without a GPU. The model of the first tab learned the same way, from "
    "50 times as many pictures."
)
COLOURS = {"each step": "#d1cdc8", "smoothed": "#c8440f", "held out": "#3b7dd8"}
BUTTONS = ("Look at the data", "Plan", "Start")
TO_THE_CHAT, TO_COMPARE = (f"() => document.querySelectorAll('[role=tab]')[{place}].click()" for place in (0, 1))


def train(models: Models, runs: Path, *, model: gr.Dropdown, versus: tuple[gr.Dropdown, gr.Dropdown]) -> None:
    """Lay the tab out and connect it; `model` is the page's model list, `versus` the two of the Compare tab. A run
    writes to `runs`."""
    handlers = Training(models, runs)
    with gr.Tab("Train", elem_id="train-tab") as tab:
        gr.Markdown(ABOUT, elem_classes="intro")
        with gr.Row(elem_classes="buttons"):
            first = gr.Button("Train the built-in model", variant="primary", elem_id="train-first")
        line = gr.HTML(elem_id="train-line", padding=False)
        with gr.Accordion("Train on your own data", open=False, elem_id="train-own", elem_classes="card"):
            base, form = _form(handlers)
            with gr.Row(elem_classes="buttons"):
                look, plan, start = (gr.Button(text, elem_id=f"train-{text.split()[0].lower()}") for text in BUTTONS)
            command = gr.Code(
                label="The same in a shell",
                language="shell",
                interactive=False,
                wrap_lines=True,
                elem_id="train-command",
            )
            told = gr.Textbox(label="Plan, or report on the data", lines=8, max_lines=16, elem_id="train-told")
            pictures = gr.Gallery(label="First examples", columns=3, height=180, elem_id="train-pictures")
        with gr.Column(elem_id="train-view", elem_classes="card"):
            view = [line, *_view()]
    run, timer, stop, resume, chat, beside, seen = view[1], *view[6:]
    look.click(handlers.look, form, [line, pictures, told], **EVENT)
    plan.click(handlers.plan, form, [line, told], **EVENT)
    gr.on([part.change for part in form], handlers.command, form, command, trigger_mode="always_last", **EVENT)
    start.click(handlers.start, form, view, **EVENT)
    first.click(handlers.first, None, view, **EVENT)
    stop.click(handlers.stop, run, view, **EVENT)
    resume.click(handlers.resume, run, view, **EVENT)
    chat.click(handlers.chat, run, model, **EVENT).then(None, js=TO_THE_CHAT)
    beside.click(handlers.compare, run, list(versus), **EVENT).then(None, js=TO_COMPARE)
    run.input(handlers.show, run, view, **EVENT)
    timer.tick(handlers.show, [run, seen], view, **EVENT)
    tab.select(handlers.greet, run, [base, *view], **EVENT)


def _form(handlers: Training) -> tuple[gr.Dropdown, list[gr.components.Component]]:
    """What `training.Form` is made of, in its order; the base apart."""
    recipes = [(f"{name}: {recipe.get('about', recipe['stage'])}", name) for name, recipe in handlers.recipes.items()]
    name = gr.Textbox("my-run", label="Name of the run", elem_id="train-name")
    cards = choices(handlers.models.cards())
    base = gr.Dropdown(cards, value=UNTRAINED, label="Model to start from", elem_id="train-base")
    recipe = gr.Dropdown(recipes, value=RECIPE, label="Recipe", elem_id="train-recipe")
    data = gr.Textbox(
        label="Data",
        info="A file or folder on this machine: LLaVA records (.json, .jsonl), metadata.jsonl, a mixture (.yaml).",
        elem_id="train-data",
    )
    images = gr.Textbox(label="Folder of its pictures", info="Empty is the folder of the data.", elem_id="train-images")
    values = handlers.fill(RECIPE)
    with gr.Row():
        fields = [
            gr.Number(value, label=field.replace("_", " "), min_width=110, elem_id=f"train-{field}")
            for field, value in zip(FIELDS, values, strict=True)
        ]
    other = gr.Textbox(
        label="Other changes to the recipe", placeholder="lora_rank=8 save_every=50", elem_id="train-more"
    )
    recipe.change(handlers.fill, recipe, fields, **EVENT)
    return base, [name, base, recipe, data, images, *fields, other]


def _view() -> list[gr.components.Component]:
    """What `run_view` fills after the line, in its order."""
    with gr.Row(elem_classes="buttons"):
        run = gr.Dropdown([], label="Run", filterable=False, scale=3, elem_id="train-run")
        stop = gr.Button("Stop", interactive=False, min_width=100, elem_id="train-stop")
        resume = gr.Button("Resume", interactive=False, min_width=100, elem_id="train-resume")
        chat = gr.Button("Chat with it", interactive=False, min_width=100, elem_id="train-chat")
        beside = gr.Button("Compare with its base", interactive=False, min_width=100, elem_id="train-compare")
    with gr.Row():
        loss = gr.LinePlot(
            x="step", y="loss", color="which", color_map=COLOURS, label="Loss", height=300, elem_id="train-loss"
        )
        rate = gr.LinePlot(x="step", y="learning rate", label="Learning rate", height=300, elem_id="train-rate")
    said = gr.Dataframe(
        label="What it answers as it learns",
        interactive=False,
        wrap=True,
        column_widths=["160px"],
        elem_id="train-answers",
    )
    log = gr.Textbox(label="End of the log", lines=10, max_lines=10, interactive=False, elem_id="train-log")
    timer, seen = gr.Timer(REFRESH, active=False), gr.State()
    return [run, loss, rate, said, log, timer, stop, resume, chat, beside, seen]
