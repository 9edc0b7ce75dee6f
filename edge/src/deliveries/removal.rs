//! The end of all runs, when their stack goes.

use aws_sdk_sfn::types::ExecutionStatus;

use super::Deliveries;
use crate::{
    Error,
    aws::{classify, is_code},
};

impl Deliveries {
    /// The runs that go on, by their ARNs: a page of a thousand at most. It may name some that were stopped a moment ago.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub async fn runs(&self) -> Result<Vec<String>, Error> {
        let list = self.runs.list_executions().set_state_machine_arn(self.machine.clone());
        match list.status_filter(ExecutionStatus::Running).max_results(1_000).send().await {
            Ok(runs) => Ok(runs.executions.into_iter().map(|run| run.execution_arn).collect()),
            // The stack may have been made by half.
            Err(error) if is_code(&error, "StateMachineDoesNotExist") => Ok(Vec::new()),
            Err(error) => Err(classify("ListExecutions", error)),
        }
    }

    /// Stops a run, whatever becomes of its delivery.
    ///
    /// # Errors
    ///
    /// [`Error`].
    pub async fn stop_run(&self, arn: &str) -> Result<(), Error> {
        match self.runs.stop_execution().execution_arn(arn).send().await {
            Ok(_) => Ok(()),
            // It has ended by itself.
            Err(error) if is_code(&error, "ExecutionDoesNotExist") => Ok(()),
            Err(error) => Err(classify("StopExecution", error)),
        }
    }
}
