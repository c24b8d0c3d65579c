//! The objectives of RL.

crate::words! {
    /// The objective that the policy maximises.
    pub enum Objective {
        /// Eq. 2 with phi = phi_1.
        Standard = "standard",
        /// Eq. 2 with phi = the members' mean.
        Mean = "mean",
        /// Eq. 2 with phi = the members' minimum (worst-case optimisation).
        Pessimistic = "pessimistic",
        /// Eq. 2 with phi = mean - k * standard deviation of the members.
        MeanMinusStd = "mean_minus_std",
        /// Eq. 2 with phi = mean - k * variance of the members: uncertainty-weighted optimisation (Coste et al. 2024).
        Uwo = "uwo",
        /// Eq. 2 with phi = -beta log mean_m exp(-phi_m / beta): the members' soft minimum.
        SoftMin = "soft_min",
        /// Eq. 7, Algorithm 1.
        Adaptive = "adaptive",
        /// Eq. 2 with phi = the members' mean and the effective KL coefficient of an adaptive run.
        Matched = "matched",
    }
}

impl Objective {
    /// Whether the objective reads only the first member's score.
    pub fn reads_first_member_only(self) -> bool {
        self == Self::Standard
    }
}
