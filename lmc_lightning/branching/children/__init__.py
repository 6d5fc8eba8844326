"""Children: built from what the trunk was made of, trained in this process or another, undisturbing."""
