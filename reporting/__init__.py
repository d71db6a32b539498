"""What people look at after a run: results, the page of captioned pictures, the model card, curves."""
