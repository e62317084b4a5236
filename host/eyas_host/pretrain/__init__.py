"""Make first weights for a student from ImageNet teachers and free images."""
