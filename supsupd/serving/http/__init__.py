"""HTTP/1.1: connections and their bounds, the routes, and what is said of them in OpenAPI."""
