"""Any LightningModule and its batches as an objective, out of reach of the trainer."""
