"""The running page against people who mean it no good."""
