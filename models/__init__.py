"""The models that ship with albor, as package data (import name: albor_models)."""
