"""What people look at after a run: results, the page of captioned images, the model card, curves."""
