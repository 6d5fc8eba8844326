"""Plain torch: a module and fixed data seen as θ ↦ loss, gradient, Hessian products."""
