"""The networks: timm models by name, their first weights, presets for recipes, what finished stages left."""
