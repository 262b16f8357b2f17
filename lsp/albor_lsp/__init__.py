"""albor's language server: editor events in, suggestions out; it talks HTTP only."""
