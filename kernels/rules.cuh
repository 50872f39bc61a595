// Every rule. FORGE_RULE names one of them, RuleInfo::cuda on the host side. A rule that the caller
// defined comes as a text, src/rule/user/source.rs.
#pragma once
#include "rules/adadelta.cuh"
#include "rules/adagrad.cuh"
#include "rules/adam.cuh"
#include "rules/adamax.cuh"
#include "rules/ademamix.cuh"
#include "rules/asgd.cuh"
#include "rules/lion.cuh"
#include "rules/nadam.cuh"
#include "rules/radam.cuh"
#include "rules/rmsprop.cuh"
#include "rules/rprop.cuh"
#include "rules/sgd.cuh"
#include "rules/signum.cuh"
#ifdef FORGE_USER_RULE
#include "user_rule.cuh"
#endif

namespace forge {

// For kernels that apply none.
struct NoRule {
    static constexpr int STATES = 0;
    static constexpr bool CODED = false;
    FORGE_DEVICE static void update(const float *, float, float, float &, float *) {}
};

constexpr bool all_coded(int states, bool first, bool second, bool third) {
    return states > 0 && first && (states < 2 || second) && (states < 3 || third);
}

// Where all states are stored as codes, a rule may take them in a form that is cheaper to come by:
// signed ones as squared levels and what a level is worth (`worth`), non-negative ones as roots,
// all of them multiplied by factors of its own; and return them in units of its own, the latter as
// roots.
template <class Rule, bool ALL_CODED> struct CodedForm {
    static constexpr bool USED = ALL_CODED && Rule::CODED;
    FORGE_DEVICE static float factor(const float *c, int state) {
        if constexpr (USED)
            return Rule::coded_factor(c, state);
        return 1.0f;
    }
    FORGE_DEVICE static float unit(const float *c, int state) {
        if constexpr (USED)
            return Rule::coded_unit(c, state);
        return 1.0f;
    }
    FORGE_DEVICE static void update(const float *c, float g, float scale, float &w, float *s,
                                    const float *worth) {
        if constexpr (USED)
            Rule::update_coded(c, g, scale, w, s, worth);
        else
            Rule::update(c, g, scale, w, s);
    }
};

} // namespace forge
