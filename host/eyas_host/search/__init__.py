"""Search: settings tried by grid or TPE, and the same network from scratch."""
