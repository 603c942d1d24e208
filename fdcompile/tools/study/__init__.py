"""What changes in a UNet from step to step: the study of features of the paper's Section 3.2, on any model."""
