"""Names, shapes and bytes of the exported graph: one place for trace, graph, engine and session."""
