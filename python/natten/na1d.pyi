# SPDX-License-Identifier: MIT
# A module of sys.modules only, see _former_modules.py.
from natten.functional import na1d as na1d
from natten.functional import na1d_av as na1d_av
from natten.functional import na1d_qk as na1d_qk
from natten.modules import NeighborhoodAttention1D as NeighborhoodAttention1D
