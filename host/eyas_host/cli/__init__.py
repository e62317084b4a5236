"""The command line: `app` is the table of verbs, one file a verb or group of verbs."""
