"""One file for each verb of `eyas-device`: `add_arguments` fills its parser, `main` runs it and returns the exit code.

Nothing heavy is imported outside `main`: `eyas-device --help` imports all of these files.
"""
