"""Where models come from, and what is recorded of them."""
