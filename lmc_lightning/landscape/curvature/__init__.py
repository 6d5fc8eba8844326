"""The Hessian at a point: its spectrum and trace, what they are made of, and what an optimizer makes of them."""
