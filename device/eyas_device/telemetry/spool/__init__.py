"""The spool: messages on disk until the collector acknowledges them."""
