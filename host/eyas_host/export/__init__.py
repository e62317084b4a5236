"""From a torch model to the files a device runs: one file a target."""
