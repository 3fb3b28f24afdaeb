"""The page in the browser: the only package that imports Gradio."""
