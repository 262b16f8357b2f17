"""A replay of real typing: what a person feels of a completion stack, beside its peers."""
