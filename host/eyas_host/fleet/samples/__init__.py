"""Labels of the samples that devices sent: which to label first, what people said, and what that makes of them."""
