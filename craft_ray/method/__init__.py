"""The method in pure torch: minimise L_task(theta) subject to L_ret(theta) <= epsilon.

`step.craft_step` reads like the paper; the other files hold one idea each.
"""
