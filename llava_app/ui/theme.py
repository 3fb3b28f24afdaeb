"""How the page looks: ash and ember, drawn with the fonts that the visitor's system has."""

from pathlib import Path

import gradio as gr
from gradio.themes.utils.colors import Color
from gradio.themes.utils.sizes import Size

HERE = Path(__file__).parent
STYLES = ("frame", "messages", "chat", "sheets", "models", "account", "tools")
SHEETS = tuple(HERE / "style" / f"{name}.css" for name in STYLES)
SCRIPT = HERE / "page.js"
MARK = HERE / "mark.svg"

META = '<meta name="color-scheme" content="light dark">'

EMBER = Color(
    name="ember",
    c50="#fff5f0",
    c100="#ffe8dd",
    c200="#ffcfb8",
    c300="#ffac87",
    c400="#fb8253",
    c500="#ea5f2b",
    c600="#c8440f",
    c700="#a3350b",
    c800="#82290c",
    c900="#6a240e",
    c950="#3a0f04",
)
ASH = Color(
    name="ash",
    c50="#faf9f8",
    c100="#f3f1ef",
    c200="#e6e3df",
    c300="#d1cdc8",
    c400="#a29d97",
    c500="#79746e",
    c600="#5b5651",
    c700="#423e3a",
    c800="#2b2825",
    c900="#1d1b19",
    c950="#131211",
)
RADIUS = Size(name="radius_soft", xxs="4px", xs="6px", sm="8px", md="10px", lg="14px", xl="18px", xxl="24px")
TEXT = Size(name="text_calm", xxs="11px", xs="12px", sm="13px", md="15px", lg="16px", xl="20px", xxl="26px")
SYSTEM_FONTS = (
    "-apple-system",
    "BlinkMacSystemFont",
    "Segoe UI",
    "Roboto",
    "Noto Sans",
    "Ubuntu",
    "Arial",
    "sans-serif",
)
SYSTEM_MONO = ("ui-monospace", "SF Mono", "Cascadia Mono", "Consolas", "Liberation Mono", "monospace")
# Gradio's names; "*" refers to another of them.
VALUES = {
    "body_background_fill": "*neutral_50",
    "body_background_fill_dark": "*neutral_950",
    "body_text_color": "*neutral_900",
    "body_text_color_dark": "*neutral_100",
    "body_text_color_subdued": "*neutral_600",
    "body_text_color_subdued_dark": "*neutral_400",
    "background_fill_primary": "white",
    "background_fill_primary_dark": "*neutral_900",
    "background_fill_secondary": "*neutral_100",
    "background_fill_secondary_dark": "*neutral_800",
    "border_color_primary": "*neutral_200",
    "border_color_primary_dark": "*neutral_800",
    "border_color_accent": "*primary_500",
    "color_accent": "*primary_500",
    "color_accent_soft": "*primary_100",
    "color_accent_soft_dark": "#3b2a21",
    "block_background_fill": "*background_fill_primary",
    "block_border_width": "1px",
    "block_shadow": "none",
    "block_label_text_color": "*body_text_color_subdued",
    "block_title_text_color": "*body_text_color",
    "block_title_text_weight": "550",
    "block_title_text_size": "*text_sm",
    "block_info_text_size": "*text_sm",
    "block_info_text_color": "*body_text_color_subdued",
    "block_radius": "*radius_lg",
    "input_background_fill": "*background_fill_primary",
    "input_background_fill_dark": "*background_fill_primary",
    "input_border_width": "1px",
    "input_border_color": "*neutral_300",
    "input_border_color_dark": "*neutral_700",
    "input_border_color_focus": "*primary_500",
    "input_border_color_focus_dark": "*primary_500",
    "input_radius": "*radius_md",
    "input_placeholder_color": "*neutral_500",
    "input_placeholder_color_dark": "*neutral_400",
    "slider_color": "*primary_500",
    "link_text_color": "*primary_600",
    "link_text_color_dark": "*primary_300",
    "button_primary_background_fill": "*primary_600",
    "button_primary_background_fill_hover": "*primary_700",
    "button_primary_border_color": "transparent",
    "button_primary_border_color_dark": "transparent",
    "button_primary_text_color": "white",
    "button_secondary_background_fill": "*background_fill_primary",
    "button_secondary_background_fill_dark": "*background_fill_primary",
    "button_secondary_background_fill_hover": "*background_fill_secondary",
    "button_secondary_background_fill_hover_dark": "*background_fill_secondary",
    "button_secondary_border_color": "*neutral_300",
    "button_secondary_border_color_dark": "*neutral_700",
    "button_border_width": "1px",
    "button_border_width_dark": "1px",
    "button_large_padding": "9px 18px",
    "button_large_radius": "*radius_md",
    "button_large_text_size": "14px",
    "button_large_text_weight": "550",
    "button_small_padding": "6px 12px",
    "button_small_radius": "*radius_md",
    "button_small_text_size": "*text_sm",
    "button_small_text_weight": "500",
    "checkbox_label_background_fill": "transparent",
    "checkbox_label_background_fill_dark": "transparent",
    "checkbox_label_background_fill_selected": "transparent",
    "checkbox_label_background_fill_selected_dark": "transparent",
    "checkbox_label_border_width": "1px",
    "checkbox_label_border_width_dark": "1px",
    "checkbox_label_border_color": "*neutral_300",
    "checkbox_label_border_color_dark": "*neutral_700",
    "checkbox_label_text_size": "14px",
    "checkbox_label_padding": "7px 12px",
    "checkbox_border_color": "*neutral_400",
    "checkbox_border_color_dark": "*neutral_600",
}


def head() -> str:
    """What goes into the page's head. As launch(css=…) Gradio would rewrite the sheets, and not know nesting."""
    sheets = "\n".join(sheet.read_text(encoding="utf-8") for sheet in SHEETS)
    return f"\n{META}\n<style>\n{sheets}</style>\n"


class Lava(gr.themes.Base):
    """The theme: warm greys, one accent, no borders where space will do."""

    def __init__(self) -> None:
        super().__init__(
            primary_hue=EMBER,
            secondary_hue=EMBER,
            neutral_hue=ASH,
            radius_size=RADIUS,
            text_size=TEXT,
            font=SYSTEM_FONTS,
            font_mono=SYSTEM_MONO,
        )
        self.set(**VALUES)
