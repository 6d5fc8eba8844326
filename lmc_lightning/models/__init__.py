"""Networks of the literature as plain modules, and one LightningModule to train them."""
