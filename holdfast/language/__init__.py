"""Language models: policies, data, and the losses that train them."""
