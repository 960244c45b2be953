"""The page of a service: plain files, and the routes that serve them."""
