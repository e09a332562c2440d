"""The validator: stages that compare every artefact with the reference, and the report."""
