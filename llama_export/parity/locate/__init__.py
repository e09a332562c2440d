"""Which layer and operation make a result wrong."""
