"""The HTTP surface: routes, schemas, errors."""
