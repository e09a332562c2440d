"""A catalogue of faults put into models, to prove the validator."""
