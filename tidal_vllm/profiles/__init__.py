"""Known models' layer roles, and how the profile of a model is found.

A profile is one JSON file: ``name``, ``models`` (globs of model names),
``num_hidden_layers``, ``dense_layers``, ``select_layers``, ``source`` (where each
number came from), if useful ``notes`` and settings of ``TidalConfig`` such as
``token_budget``. Layers are 0-based. One that ``tidal-vllm calibrate`` wrote also has
``model``, ``config_sha256``, ``measured`` and ``versions``. Any of it may be edited by
hand. Imports neither torch nor vLLM.

profile      the layer roles of one model, and whether they fit another
load         a profile's file, and everything in it that is refused
search       which profile is for a model
fingerprint  the hash that ties a measured profile to its model
show         what `tidal-vllm profiles` prints
"""

from tidal_vllm.profiles.load import load_profile
from tidal_vllm.profiles.profile import PACKAGED_DIR, Profile, model_names
from tidal_vllm.profiles.search import (
    PROJECT_DIR,
    find_profile,
    list_profiles,
    named_profile,
    near_miss,
)

__all__ = [
    "PACKAGED_DIR",
    "PROJECT_DIR",
    "Profile",
    "find_profile",
    "list_profiles",
    "load_profile",
    "model_names",
    "named_profile",
    "near_miss",
]
