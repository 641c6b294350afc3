"""LangChain adapter of turboquant-local: the import root is reserved, nothing stands behind it yet."""
