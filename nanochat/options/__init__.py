"""The options of every command: frozen dataclasses that the command line, presets and configurations share.

Nothing here imports torch, so that help and errors appear at once.
"""
