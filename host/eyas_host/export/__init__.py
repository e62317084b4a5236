"""Export a torch model to the files a device runs: one module per target."""
