"""Turns numbers into HTML, Markdown and pictures: a tool that knows no stage, only what it is given."""
