//! How tasks and runs end, in the words of Step Functions.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Step Functions' own error names.
pub mod error_name {
    /// Matches every error but [`DATA_LIMIT_EXCEEDED`] and [`RUNTIME`].
    pub const ALL: &str = "States.ALL";
    /// A state or the whole run took too long.
    pub const TIMEOUT: &str = "States.Timeout";
    /// Nobody gave a sign of life about a task in time; also matched as [`TIMEOUT`].
    pub const HEARTBEAT_TIMEOUT: &str = "States.HeartbeatTimeout";
    /// Matches every error of a task but [`TIMEOUT`].
    pub const TASK_FAILED: &str = "States.TaskFailed";
    /// The run did something that the machine does not define.
    pub const RUNTIME: &str = "States.Runtime";
    /// A value is over 256 KiB.
    pub const DATA_LIMIT_EXCEEDED: &str = "States.DataLimitExceeded";
    /// An expression failed or had no value.
    pub const QUERY_EVALUATION_ERROR: &str = "States.QueryEvaluationError";
    /// No choice held, and there was no default.
    pub const NO_CHOICE_MATCHED: &str = "States.NoChoiceMatched";
}

/// Why a task failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskError {
    /// The name that `ErrorEquals` is compared with.
    pub error: Cow<'static, str>,
    /// Words for people.
    pub cause: String,
}

impl TaskError {
    /// An error with this name and these words.
    pub fn new(error: impl Into<Cow<'static, str>>, cause: impl Into<String>) -> Self {
        Self { error: error.into(), cause: cause.into() }
    }
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// With an output.
    Succeeded(Value),
    /// With an error.
    Failed(TaskError),
    /// Out of time.
    TimedOut(TaskError),
}

/// Where a STANDARD run stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// It is still going.
    Running,
    /// It ended with this output.
    Succeeded(Value),
    /// It ended with this error.
    Failed(TaskError),
    /// It ran out of time.
    TimedOut(TaskError),
    /// Somebody stopped it.
    Aborted(TaskError),
}

impl Status {
    /// The status in the words of Step Functions.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Running => "RUNNING",
            Self::Succeeded(_) => "SUCCEEDED",
            Self::Failed(_) => "FAILED",
            Self::TimedOut(_) => "TIMED_OUT",
            Self::Aborted(_) => "ABORTED",
        }
    }

    /// Whether a run that stands there may be redriven.
    pub(super) fn is_redrivable(&self) -> bool {
        matches!(self, Self::Failed(_) | Self::TimedOut(_) | Self::Aborted(_))
    }
}
