"""The command line: a table of verbs (`app`), one file for each group of verbs, a help page for each verb."""
