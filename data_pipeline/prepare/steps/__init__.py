"""The steps of a preparation. Each heavy library is imported in one module of this room."""
