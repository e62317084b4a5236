"""The networks: timm models by name, their first weights, what finished stages left."""
