"""What a run found, for people: a page, a picture and a model card."""
