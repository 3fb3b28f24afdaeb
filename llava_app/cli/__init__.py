"""The verbs of python -m llava_app: one module each, whose `main` takes the arguments and returns an exit code."""
