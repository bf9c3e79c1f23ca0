"""Memory, disk and time of a recipe from config.json alone: no torch, no download.

`inputs` reads what an estimate depends on, `memory` adds up a step's peak, `fit` compares it with a device, `advice`
proposes settings that fit, and `report` prints it all for `finetune estimate`.
"""
