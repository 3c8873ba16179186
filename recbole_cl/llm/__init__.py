"""Language models as parts: text encoders, and what asks them."""
