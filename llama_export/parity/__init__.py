"""Parity: judge every artefact of a bundle against the checkpoint's own model, stage by stage, with numbers."""
