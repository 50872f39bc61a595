// Every rule. FORGE_RULE names one of them, RuleInfo::cuda on the host side.
#pragma once
#include "rules/adam.cuh"
#include "rules/lion.cuh"
#include "rules/sgd.cuh"
