"""One file a verb of `eyas-device`: `arguments` describes its command line, `main` runs it and returns the exit code.

Nothing heavy is imported outside of `main`: `eyas-device --help` reads all of these files.
"""
